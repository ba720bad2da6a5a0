"""One architecture a file: `class Config(ModelConfig)` and `class Model(nn.Module)`, built as `Model(config, info)`.

`model.name = "mlp"` means `models/mlp.py`: the folder listing is the registry, so adding a model is adding a file.
"""
