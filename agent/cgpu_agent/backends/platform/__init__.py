"""What stands below the vTPM: Azure's paravisor, a CPU behind the kernel's own interface, or nothing that says so."""
