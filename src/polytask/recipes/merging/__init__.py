"""Many fine-tuned models into one."""
