"""Reads examples, and turns their images and text into model input.

Import the modules themselves. `digit_boards`, `sources` and `pipeline` provide examples.
`processor` turns them into model input with the help of `files`, `families`, `chat`, `images`,
`video` and `layout`. `corrupt` makes copies of examples with corrupted images.

Importing these modules does not import jax, because data worker processes import them.
"""
