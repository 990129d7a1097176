package publish

import (
	"os"
	"testing"

	"github.com/usernet/usernet/internal/nettest"
)

// The host's ports of the tests are those of a network namespace of their own.
func TestMain(m *testing.M) { os.Exit(nettest.Main(m)) }
