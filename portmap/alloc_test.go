//go:build !race

package portmap

import "testing"

// Under the race detector sync.Pool drops items on purpose, hence the build tag.
func TestUDPSteadyStateDoesNotAllocate(t *testing.T) {
	m := newMapper(t)
	f := publish(t, m, udpPort(udpEcho(t, container)), Host{})
	for _, host := range []string{"127.0.0.1", "::1"} {
		c := udpClient(t, at(f, host))
		buf := make([]byte, 1200)
		exchange := func() {
			c.Write(buf)
			c.Read(buf)
		}
		exchange()
		if n := testing.AllocsPerRun(1000, exchange); n > 0 {
			t.Errorf("through %s: %v allocations for each exchange, want none", host, n)
		}
	}
}
