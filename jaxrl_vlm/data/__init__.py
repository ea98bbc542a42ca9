"""Where examples come from, and how images and text become a model's input.

Nothing here imports jax when it is imported: data workers do. Import the modules themselves:
digit_boards, sources, pipeline (examples), processor (model input) and its parts: files, families,
chat, images, video, layout.
"""
