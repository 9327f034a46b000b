"""The network, its losses and the model that ties them to docids."""
