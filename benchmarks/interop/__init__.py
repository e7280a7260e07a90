"""Other families, other tools' formats and exporters."""
