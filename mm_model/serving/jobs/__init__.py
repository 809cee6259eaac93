"""Long jobs: kept in a database and a folder, worked off by whichever replica is free."""
