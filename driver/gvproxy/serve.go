package gvproxy

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"time"
)

// grace is how long requests that are being served when Serve is cancelled may still take.
const grace = 5 * time.Second

// Serve answers requests on l by h until ctx is done, and closes l. Then it waits for those that are being served, tunnels and
// VMs on /connect among them, which end with ctx, and returns nil.
func Serve(ctx context.Context, l net.Listener, h http.Handler, log *slog.Logger) error {
	// Shutdown knows nothing of connections that handlers have taken over. The lock waits for those; it is never given back,
	// so that no handler begins after it.
	var serving sync.RWMutex
	base, cancel := context.WithCancel(ctx)
	defer cancel()
	srv := &http.Server{
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if !serving.TryRLock() {
				http.Error(w, "the gateway is stopping", http.StatusServiceUnavailable)
				return
			}
			defer serving.RUnlock()
			h.ServeHTTP(w, r)
		}),
		ReadTimeout:    timeout,
		WriteTimeout:   timeout,
		MaxHeaderBytes: 16 << 10,
		BaseContext:    func(net.Listener) context.Context { return base },
		ErrorLog:       slog.NewLogLogger(log.Handler(), slog.LevelWarn),
	}
	stopped := make(chan error, 1)
	stop := context.AfterFunc(ctx, func() {
		late, done := context.WithTimeout(context.WithoutCancel(ctx), grace)
		defer done()
		stopped <- srv.Shutdown(late)
	})
	err := srv.Serve(l)
	if stop() {
		srv.Close()
		cancel()
		serving.Lock()
		return fmt.Errorf("serve %s: %w", l.Addr(), err)
	}
	if err := <-stopped; err != nil {
		srv.Close()
	}
	serving.Lock()
	return nil
}
