"""What several tests need: toy services, tiny models, processes, and their faults."""
