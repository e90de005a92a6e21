"""Fox-1's exact shape on one NVIDIA GPU: floors, exactness, speed, the peer and questions, in one command."""
