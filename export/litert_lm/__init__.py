"""LiteRT-LM: one .litertlm with the graph, its cache inside, tokenizer, chat template and what a runner must know."""
