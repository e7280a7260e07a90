"""Core AI, Apple's runtime for models of one's own from iOS 27 and macOS 27 on: the folder that its
`CoreAILanguageModel(resourcesAt:)` opens."""

FOLDER = "model"
"""Of an artifact: what that opens."""
ASSET = "model.aimodel"
"""In it: the program with its weights."""
METADATA = "metadata.json"
"""In both: what they say of themselves."""
TOKENIZER = "tokenizer"
"""In it: a folder as Hugging Face's libraries read it."""
