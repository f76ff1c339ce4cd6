"""How cutloss meets PyTorch: its operators, their shapes for tracing, one autograd family."""
