package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"

	"github.com/gorilla/mux"

	"github.com/usernet/usernet"
	"github.com/usernet/usernet/driver"
)

// maxBody bounds a request, in bytes: all ports of a host, twice, are less.
const maxBody = 16 << 20

// none is the body of a request or an answer that has none.
type none struct{}

// vars are the variable parts of a request's path.
type vars map[string]string

// doer is the work behind one method.
type doer[Req, Res any] func(ctx context.Context, v vars, req Req) (Res, error)

// Handler serves the control API for d. defaults are options of every network that does not give them. Descriptors that
// come with requests are found only if the server listens on what Listener returned.
func Handler(d *driver.Driver, defaults map[string]string, log *slog.Logger) http.Handler {
	r := mux.NewRouter()
	for _, route := range []struct {
		method, path string
		handler      http.Handler
	}{
		{http.MethodGet, "/v1/networks", call(log, networks(d))},
		{http.MethodPost, "/v1/networks/prepare", call(log, prepare(d, defaults))},
		{http.MethodDelete, "/v1/networks/{id}", call(log, removeNetwork(d))},
		{http.MethodPost, "/v1/endpoints", call(log, attach(d, defaults))},
		{http.MethodDelete, "/v1/networks/{id}/endpoints/{endpoint}", call(log, detach(d))},
		{http.MethodPost, "/v1/endpoints/{id}/ports", call(log, addPorts(d))},
		{http.MethodDelete, "/v1/endpoints/{id}/ports", call(log, removePorts(d))},
	} {
		r.Handle(route.path, route.handler).Methods(route.method)
	}
	return r
}

// networks lists all networks, or, when a namespace came with the request, what the container is on whose it is.
func networks(d *driver.Driver) doer[none, []Network] {
	return func(ctx context.Context, _ vars, _ none) ([]Network, error) {
		all, err := seen(ctx, d)
		list := []Network{}
		for _, n := range all {
			list = append(list, networkOf(n))
		}
		return list, err
	}
}

func seen(ctx context.Context, d *driver.Driver) ([]driver.NetworkStatus, error) {
	ns, err := namespace(ctx)
	if err != nil {
		return nil, err
	}
	if ns == nil {
		return d.Status(), nil
	}
	defer ns.Close()
	return d.StatusIn(ctx, ns)
}

func removeNetwork(d *driver.Driver) doer[none, none] {
	return func(ctx context.Context, v vars, _ none) (none, error) {
		n, err := d.FindNetwork(ctx, v["id"])
		if err != nil {
			return none{}, err
		}
		return none{}, d.DeleteNetwork(ctx, n.ID)
	}
}

func addPorts(d *driver.Driver) doer[portsBody, portsBody] {
	return func(ctx context.Context, v vars, req portsBody) (portsBody, error) {
		e, err := d.FindEndpoint(ctx, v["id"])
		if err != nil {
			return portsBody{}, err
		}
		got, err := d.AddPorts(ctx, e.NetworkID, e.ID, portValues(req.Ports))
		return portsBody{portsOf(got)}, err
	}
}

func removePorts(d *driver.Driver) doer[portsBody, none] {
	return func(ctx context.Context, v vars, req portsBody) (none, error) {
		e, err := d.FindEndpoint(ctx, v["id"])
		if err != nil {
			return none{}, err
		}
		return none{}, d.RemovePorts(ctx, e.NetworkID, e.ID, portValues(req.Ports))
	}
}

// call decodes a request, has it done and encodes the answer.
func call[Req, Res any](log *slog.Logger, do doer[Req, Res]) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var req Req
		if _, empty := any(req).(none); !empty {
			if err := decode(w, r, &req); err != nil {
				answer(w, log, http.StatusBadRequest, errorBody{Error: err.Error()})
				return
			}
		}
		res, err := do(r.Context(), mux.Vars(r), req)
		if err != nil {
			answer(w, log, status(err), errorBody{err.Error(), kindOf(err)})
			return
		}
		answer(w, log, http.StatusOK, res)
	})
}

func decode(w http.ResponseWriter, r *http.Request, req any) error {
	dec := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxBody))
	dec.DisallowUnknownFields()
	if err := dec.Decode(req); err != nil {
		return fmt.Errorf("read request: %w", err)
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return errors.New("read request: more than one value")
	}
	return nil
}

func answer(w http.ResponseWriter, log *slog.Logger, code int, body any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	if err := json.NewEncoder(w).Encode(body); err != nil {
		log.Debug("answer is not delivered", "error", err)
	}
}

// status is the HTTP status that goes with an error.
func status(err error) int {
	switch {
	case errors.Is(err, usernet.ErrNotFound):
		return http.StatusNotFound
	case errors.Is(err, usernet.ErrExists), errors.Is(err, usernet.ErrPortTaken):
		return http.StatusConflict
	case errors.Is(err, usernet.ErrInvalid):
		return http.StatusBadRequest
	case errors.Is(err, driver.ErrClosed):
		return http.StatusServiceUnavailable
	}
	return http.StatusInternalServerError
}
