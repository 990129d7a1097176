package cni

import (
	"errors"
	"fmt"

	"github.com/containernetworking/cni/pkg/types"

	"github.com/usernet/usernet"
	"github.com/usernet/usernet/driver"
	"github.com/usernet/usernet/driver/control"
)

// The codes of errors that the specification leaves to plugins.
const (
	codePortTaken = 100 // a host port is somebody else's
	codeExists    = 101 // the network, the interface or the address is there already and is something else
	codeDiffers   = 102 // CHECK: the container does not have what the result of ADD says
)

// coded gives an error the code that runtimes know it by. One that has a code keeps it: an IPAM plugin's.
func coded(err error) error {
	if err == nil {
		return nil
	}
	code := types.ErrInternal
	if e, ok := errors.AsType[*types.Error](err); ok {
		if e == err {
			return e
		}
		return types.NewError(e.Code, err.Error(), "")
	}
	for _, k := range []struct {
		kind error
		code uint
	}{
		{usernet.ErrInvalid, types.ErrInvalidNetworkConfig},
		{usernet.ErrPortTaken, codePortTaken},
		{usernet.ErrExists, codeExists},
		{driver.ErrExhausted, types.ErrTryAgainLater},
		{driver.ErrClosed, types.ErrTryAgainLater},
		{control.ErrAbsent, types.ErrTryAgainLater},
	} {
		if errors.Is(err, k.kind) {
			code = k.code
			break
		}
	}
	return types.NewError(code, err.Error(), "")
}

func failed(code uint, format string, args ...any) error {
	return types.NewError(code, fmt.Sprintf(format, args...), "")
}

// invalid is an error of the network's configuration.
func invalid(format string, args ...any) error {
	return failed(types.ErrInvalidNetworkConfig, format, args...)
}

func differs(format string, args ...any) error { return failed(codeDiffers, format, args...) }
