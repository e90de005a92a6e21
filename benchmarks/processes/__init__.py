"""Work in processes of their own: started, capped, watched, and told how they died."""
