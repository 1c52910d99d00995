"""Adapters for trainers and loaders: one file each, and each imports only the package it is named after."""
