"""From the name of a model to tensors that fit our ViT.

fetch      a name or path -> local files
weights    a local file -> tensors, or a refusal with its reason
layouts    tensors in anyone's layout -> the state dict of our ViT
registry   what is known about a model: configuration, tile specification, terms
model      all of it together
mini       the weights of xmag-mini, which ship inside the package
"""
