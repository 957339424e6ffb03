"""The networks.

A dimension has one letter, in every signature of the package, and a letter has one meaning:

B   rows of a batch                     T   positions of a row
I   images that a row has room for      S   slots of the cache, or positions of the keys
P   patches of an image                 H   width of the language model
K   vision tokens of an image           N   query heads
M   taps of the tower                   G   key-value heads, each shared by N / G query heads
C   width of the tower                  D   width of a head
W   side of a window, in patches        F   hidden width of an MLP
V   vocabulary                          L   layers
R   rows of a whole global batch, or of one call of the engine

Other dimensions have words: `height`, `width`, `examples`.
"""
