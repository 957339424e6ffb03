"""The networks.

Dimensions have one letter each, here and in every signature:

B batch, I images in a row, P patches of an image, K vision tokens of an image (key-value heads in
the decoder), M taps, C vision width, T text positions, S cache slots, H language model width,
N heads, D head width, F hidden width of an MLP, L layers, V vocabulary.
"""
