"""IPA archives and their Mach-O program."""
