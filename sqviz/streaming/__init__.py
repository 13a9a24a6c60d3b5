"""StreamingLLM (thesis ch. 4): endless text at constant memory."""
