"""The operator under the interfaces of other packages: models written for them run unchanged."""
