package sock

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"time"
)

// grace is how long requests that are being served when Serve is cancelled may still take.
const grace = 15 * time.Second

// Serve answers requests on l until ctx is cancelled; then it lets those that are being served finish and returns nil, or
// an error if they take longer than 15 s. It closes l. If l has a method ConnContext, it is the server's (http.Server).
func Serve(ctx context.Context, l net.Listener, h http.Handler) error { return serve(ctx, l, h, grace) }

func serve(ctx context.Context, l net.Listener, h http.Handler, grace time.Duration) error {
	// There is no limit on idle connections: when we close one just as Docker sends on it, Docker sends again, but
	// without the body. And none on writing, or on reading as a whole: creating a network may take its time.
	srv := &http.Server{Handler: h, ReadHeaderTimeout: 10 * time.Second}
	if c, ok := l.(interface {
		ConnContext(context.Context, net.Conn) context.Context
	}); ok {
		srv.ConnContext = c.ConnContext
	}
	stopped := make(chan error, 1)
	stop := context.AfterFunc(ctx, func() {
		late, cancel := context.WithTimeout(context.WithoutCancel(ctx), grace)
		defer cancel()
		stopped <- srv.Shutdown(late)
	})
	err := srv.Serve(l)
	if stop() {
		srv.Close()
		return fmt.Errorf("serve %s: %w", l.Addr(), err)
	}
	if err := <-stopped; err != nil {
		srv.Close()
		return fmt.Errorf("serve %s: requests are still running: %w", l.Addr(), err)
	}
	return nil
}
