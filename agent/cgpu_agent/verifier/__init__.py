"""Pure judgement: runs on a relying party, opens no socket, reads no clock."""
