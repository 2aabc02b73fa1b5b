"""Zero-shot detection by efficient feature distillation: the method, in torch, without disk or clock."""
