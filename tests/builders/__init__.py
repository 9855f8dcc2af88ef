"""What the tests are made of: images, detectors, projects, servers, a browser."""
