"""MediaTek's compiler."""
