package gateway

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"

	"github.com/usernet/usernet/usermode/l2"
)

// writePID writes the number of the process as podman machine reads it: without a newline. The file goes at the end, unless it has become
// that of another process.
func (g *Gateway) writePID() (service, error) {
	path, text := g.cfg.PIDFile, []byte(strconv.Itoa(os.Getpid()))
	if err := os.WriteFile(path, text, 0o644); err != nil {
		return service{}, fmt.Errorf("write PID: %w", err)
	}
	remove := func() error {
		now, err := os.ReadFile(path)
		if errors.Is(err, fs.ErrNotExist) || err == nil && !bytes.Equal(now, text) {
			return nil
		}
		return errors.Join(err, os.Remove(path))
	}
	return service{
		run: func(ctx context.Context) error {
			<-ctx.Done()
			return remove()
		},
		close: remove,
	}, nil
}

// capture writes all frames to a file.
func (g *Gateway) capture() (service, error) {
	f, err := os.Create(g.cfg.Capture)
	if err != nil {
		return service{}, fmt.Errorf("capture: %w", err)
	}
	c := l2.NewCapture(f)
	g.net.Switch().Capture(c)
	return service{
		run: func(ctx context.Context) error {
			// A disk that is full is no reason to end the network.
			err := errors.Join(c.Run(ctx), f.Close())
			g.net.Switch().Capture(nil)
			if err != nil {
				g.log.Error("capture has ended", "file", f.Name(), "err", err)
			}
			if n := c.Dropped(); n > 0 {
				g.log.Warn("frames were not captured: the file was too slow", "file", f.Name(), "frames", n)
			}
			return nil
		},
		close: f.Close,
	}, nil
}
