package control

import (
	"encoding/json"
	"errors"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os/exec"
	"strings"
	"testing"

	"github.com/usernet/usernet"
	"github.com/usernet/usernet/driver"
)

func TestTied(t *testing.T) {
	d, err := driver.Open(driver.Config{StateDir: t.TempDir(), RunDir: t.TempDir(), Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	}()
	served, left := 0, 0
	h := Tied(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { served++ }), d, func() { left++ })
	ask := func(method, from string) *http.Response {
		req := httptest.NewRequest(method, "/v1/endpoints", nil)
		if from != "" {
			req.Header.Set(callersNamespace, from)
		}
		w := httptest.NewRecorder()
		h.ServeHTTP(w, req)
		return w.Result()
	}
	// usernet ps and its like do not say where they are; what is to be taken away may have been made from anywhere.
	ask(http.MethodGet, "1")
	ask(http.MethodDelete, "1")
	ask(http.MethodPost, "")
	ask(http.MethodPost, userNamespace())
	if served != 4 || left != 0 {
		t.Fatalf("%d requests are served and %d have made the daemon leave, want 4 and 0", served, left)
	}

	n := usernet.Network{ID: "aaaaaaaaaaaa", Options: usernet.Options{Mode: usernet.Usermode},
		Subnets: []usernet.Subnet{{Prefix: netip.MustParsePrefix("10.200.1.0/24"), Gateway: netip.MustParseAddr("10.200.1.1")}}}
	if err := d.CreateNetwork(t.Context(), n); err != nil {
		t.Fatal(err)
	}
	ep := usernet.Endpoint{ID: "bbbbbbbbbbbb", NetworkID: n.ID, Addr4: netip.MustParsePrefix("10.200.1.2/24")}
	if _, err := d.CreateEndpoint(t.Context(), ep); err != nil {
		t.Fatal(err)
	}
	refused := func(want string) {
		t.Helper()
		res := ask(http.MethodPost, "1")
		var body errorBody
		if err := json.NewDecoder(res.Body).Decode(&body); err != nil || res.StatusCode != http.StatusMisdirectedRequest || !strings.Contains(body.Error, want) {
			t.Errorf("status %d, %q, %v; want %q", res.StatusCode, body.Error, err, want)
		}
	}
	refused("containers still run in it")
	if left != 0 {
		t.Error("the daemon leaves its containers")
	}
	if err := d.DeleteEndpoint(t.Context(), n.ID, ep.ID); err != nil {
		t.Fatal(err)
	}
	refused("Podman has left")
	if served != 4 || left != 1 {
		t.Errorf("%d requests are served and %d have made the daemon leave, want 4 and 1", served, left)
	}
	if err := d.DeleteNetwork(t.Context(), n.ID); err != nil {
		t.Error(err)
	}
}

func TestWaitForTheEnd(t *testing.T) {
	cmd := exec.Command("cat")
	hold, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	e := &leavingError{cmd.Process.Pid}
	if !errors.Is(e, errLeft) {
		t.Errorf("%v does not wrap errLeft", e)
	}
	waited := make(chan error, 1)
	go func() { waited <- e.wait(t.Context()) }()
	select {
	case err := <-waited:
		t.Errorf("wait returned %v before the end", err)
	default:
	}
	hold.Close()
	if err := <-waited; err != nil {
		t.Error(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Error(err)
	}
	if err := e.wait(t.Context()); err != nil {
		t.Errorf("wait for a process that is gone: %v", err)
	}
}
