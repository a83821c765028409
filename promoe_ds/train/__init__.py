"""The training loop: its loss, log, sample grids and profile, and where what is not finite comes from."""
