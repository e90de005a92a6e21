"""Exports really run on ARM: on x86 under qemu, without and with the instructions of newer phones."""
