//go:build linux

package main

import (
	"context"
	"log/slog"
	"net"
	"net/http"
	"path/filepath"
	"testing"
	"time"

	"github.com/usernet/usernet/internal/nettest"
	"github.com/usernet/usernet/vsock/publish"
)

// The daemon has a session with its gateway while it runs.
func TestServeWithHostGateway(t *testing.T) {
	nettest.NoLeaks(t)
	dir := t.TempDir()
	l, err := net.Listen("unix", filepath.Join(dir, "gateway.sock"))
	if err != nil {
		t.Fatal(err)
	}
	s := publish.NewServer(publish.ServerConfig{Log: slog.New(slog.DiscardHandler)})
	begun, ended := make(chan struct{}), make(chan struct{})
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == publish.SessionPath {
			close(begun)
			defer close(ended)
		}
		s.ServeHTTP(w, r)
	})}
	served := make(chan error, 1)
	go func() { served <- srv.Serve(l) }()
	defer func() { srv.Close(); <-served; s.Close() }()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	code := make(chan int, 1)
	go func() {
		status, _, stderr := runProgram(t, ctx, "serve", "--plugin-socket", filepath.Join(dir, "plugin.sock"), "--control-socket", filepath.Join(dir, "control.sock"),
			"--state-dir", dir, "--run-dir", filepath.Join(dir, "run"), "--host-gateway", "unix://"+filepath.Join(dir, "gateway.sock"))
		t.Log(stderr)
		code <- status
	}()
	select {
	case <-begun:
	case status := <-code:
		t.Fatalf("serve has ended with status %d", status)
	}
	cancel()
	if status := <-code; status != 0 {
		t.Errorf("exit status %d", status)
	}
	<-ended
}
