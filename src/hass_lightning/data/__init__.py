"""From prompts to batches: conversations, tokens with their loss mask, target features, the datamodule."""
