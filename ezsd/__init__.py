"""Zero-shot detection by efficient feature distillation: the method, in torch.

It reads annotation, result and weight files; it writes nothing and knows neither clock nor configuration.
"""
