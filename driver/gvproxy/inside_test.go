package gvproxy

import (
	"testing"
)

const (
	me    = "192.168.127.2:5000"
	other = "192.168.127.3:5000"
)

// What Podman in a machine asks for: a remote without a host is the machine that asks.
func TestInsidePodman(t *testing.T) {
	g := newFake()
	run(t, Inside(g), me, []call{
		{"POST", exposePath, `{"local":"127.0.0.1:8080","remote":":8080","protocol":"tcp"}`, 200, ""},
		{"POST", exposePath, `{"local":":53","remote":":53","protocol":"udp"}`, 200, ""},
		{"POST", exposePath, `{"local":":81","remote":"192.168.127.2:80"}`, 200, ""},
		{"GET", allPath, ``, 200, `[{"local":"127.0.0.1:8080","remote":"192.168.127.2:8080","protocol":"tcp"},` +
			`{"local":":53","remote":"192.168.127.2:53","protocol":"udp"},{"local":":81","remote":"192.168.127.2:80","protocol":"tcp"}]` + "\n"},
		{"POST", unexposePath, `{"local":"127.0.0.1:8080","protocol":"tcp"}`, 200, ""},
		{"POST", unexposePath, `{"local":"127.0.0.1:8080","protocol":"tcp"}`, 500, "proxy not found\n"},
	})
	run(t, Inside(g), "[fd00::2]:5000", []call{
		{"POST", exposePath, `{"local":":86","remote":":80"}`, 200, ""},
		{"GET", allPath, ``, 200, `[{"local":":86","remote":"[fd00::2]:80","protocol":"tcp"}]` + "\n"},
	})
	run(t, Inside(g), "[::ffff:192.168.127.9]:5000", []call{
		{"POST", exposePath, `{"local":":89","remote":":80"}`, 200, ""},
		{"GET", allPath, ``, 200, `[{"local":":89","remote":"192.168.127.9:80","protocol":"tcp"}]` + "\n"},
	})
}

// gvproxy let a guest delete files of the host, by a forward of a unix socket at their path (its issue 681), and take over what
// another guest had published, by ending its forward (714).
func TestInsideOthers(t *testing.T) {
	const forbidden = "a guest can forward tcp and udp to itself only\n"
	const hidden = "ssh-tunnel://core@192.168.127.2:22/run/podman.sock?key=/home/me/key&passphrase=secret"
	before := []Forward{
		forward(t, TCP, ":8080", "192.168.127.3:80"),
		forward(t, Unix, "/run/podman.sock", hidden),
		forward(t, Unix, "/run/plain.sock", "tcp://192.168.127.2:80"),
	}
	g := newFake(before...)
	run(t, Inside(g), me, []call{
		{"GET", allPath, ``, 200, "[]\n"},
		{"POST", exposePath, `{"protocol":"unix","local":"/etc/passwd","remote":"tcp://192.168.127.2:80"}`, 403, forbidden},
		{"POST", exposePath, `{"protocol":"unix","local":"/etc/passwd","remote":"` + hidden + `"}`, 403, forbidden},
		{"POST", exposePath, `{"protocol":"npipe","local":"npipe:////./pipe/x","remote":"tcp://192.168.127.2:80"}`, 403, forbidden},
		{"POST", exposePath, `{"local":":81","remote":"192.168.127.3:80"}`, 403, forbidden},
		{"POST", exposePath, `{"local":":81","remote":"127.0.0.1:80"}`, 403, forbidden},
		{"POST", exposePath, `{"local":":8080","remote":":80"}`, 500, "proxy already running for tcp on :8080\n"},
		{"POST", unexposePath, `{"local":":8080"}`, 500, "proxy not found\n"},
		{"POST", unexposePath, `{"local":"/run/podman.sock","protocol":"unix"}`, 500, "proxy not found\n"},
		{"POST", unexposePath, `{"local":"/run/plain.sock","protocol":"unix"}`, 500, "proxy not found\n"},
	})
	for _, from := range []string{"@", "", "nonsense"} {
		run(t, Inside(g), from, []call{
			{"GET", allPath, ``, 200, "[]\n"},
			{"POST", exposePath, `{"local":":81","remote":"192.168.127.2:80"}`, 403, forbidden},
			{"POST", unexposePath, `{"local":":8080"}`, 500, "proxy not found\n"},
		})
	}
	if got := g.Forwards(); len(got) != len(before) {
		t.Errorf("forwards now: %v", got)
	}
	run(t, Inside(g), other, []call{{"POST", unexposePath, `{"local":":8080"}`, 200, ""}})
}
