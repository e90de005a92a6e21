"""GGUF files in llama.cpp: its sessions, and what a file may say before it sees it."""
