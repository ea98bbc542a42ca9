"""Where examples come from, and how images and text become a model's input.

Nothing here imports jax when it is imported: data workers do. Import the modules themselves:
digit_boards, sources, pipeline (examples), images, processor (model input).
"""
