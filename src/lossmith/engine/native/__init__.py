"""The C++ sources and their build."""
