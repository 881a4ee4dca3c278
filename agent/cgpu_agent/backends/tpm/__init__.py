"""The vTPM: one owner thread over one file descriptor."""
