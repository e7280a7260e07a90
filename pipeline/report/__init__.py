"""Reports as pages, pictures and what CI systems read."""
