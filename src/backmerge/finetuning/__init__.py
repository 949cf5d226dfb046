"""Fine-tuning: data to chat-formatted examples, and the LoRA trainer."""
