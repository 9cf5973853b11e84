"""What only a GPU can show (G1 to G8): `python -m benchmarks.gpu`."""
