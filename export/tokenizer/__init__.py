"""tokenizer.json and what lies beside it, as programs of users read them."""
