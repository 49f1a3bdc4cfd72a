"""Cross-magnification distillation: a student at 2.0 µm/px learns what teachers see at 0.5."""
