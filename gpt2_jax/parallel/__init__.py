"""Meshes, shardings, rematerialisation, and several processes."""
