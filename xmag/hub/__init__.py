"""Model files: found or fetched by name, read, and converted to a state dict of our ViT.

fetch      a name or path -> local files
weights    a local file -> tensors, or a refusal with its reason
layouts    tensors in anyone's layout -> the state dict of our ViT
registry   the known models: configuration, tile specification, terms
model      all of it in one call
mini       the weights of xmag-mini, which ship inside the package
"""
