"""Fine-tuning: turn data into chat-formatted examples, and train a LoRA or a whole model on them."""
