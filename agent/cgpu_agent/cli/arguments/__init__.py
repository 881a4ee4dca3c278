"""What each command takes, a module a command, importing nothing heavy: every run of cgpuctl loads them all."""
