"""The commands of ``polytask``, one file a group; each imports what it runs on inside its functions."""
