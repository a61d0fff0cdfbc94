"""Reading files of users within bounds, and writing them whole or not at all."""
