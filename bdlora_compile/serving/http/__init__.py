"""OpenAI's protocol over the decode engine. `app` puts the routes together, `server` is the process of a rank."""
