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

// maxBody bounds a request, in bytes. The longest list of ports that makes sense is well below it.
const maxBody = 1 << 20

// none is the body of a request or an answer that has none.
type none struct{}

// Handler serves the control API for d.
func Handler(d *driver.Driver, log *slog.Logger) http.Handler {
	r := mux.NewRouter()
	r.Handle("/v1/networks", call(log, func(context.Context, string, none) ([]Network, error) {
		list := []Network{}
		for _, n := range d.Status() {
			list = append(list, networkOf(n))
		}
		return list, nil
	})).Methods(http.MethodGet)
	r.Handle("/v1/networks/{id}", call(log, func(ctx context.Context, id string, _ none) (none, error) {
		n, err := d.FindNetwork(ctx, id)
		if err != nil {
			return none{}, err
		}
		return none{}, d.DeleteNetwork(ctx, n.ID)
	})).Methods(http.MethodDelete)
	r.Handle("/v1/endpoints/{id}/ports", call(log, func(ctx context.Context, id string, req portsBody) (portsBody, error) {
		e, err := d.FindEndpoint(ctx, id)
		if err != nil {
			return portsBody{}, err
		}
		got, err := d.AddPorts(ctx, e.NetworkID, e.ID, portValues(req.Ports))
		return portsBody{portsOf(got)}, err
	})).Methods(http.MethodPost)
	r.Handle("/v1/endpoints/{id}/ports", call(log, func(ctx context.Context, id string, req portsBody) (none, error) {
		e, err := d.FindEndpoint(ctx, id)
		if err != nil {
			return none{}, err
		}
		return none{}, d.RemovePorts(ctx, e.NetworkID, e.ID, portValues(req.Ports))
	})).Methods(http.MethodDelete)
	return r
}

// call decodes a request, has it done and encodes the answer.
func call[Req, Res any](log *slog.Logger, do func(ctx context.Context, id string, req Req) (Res, error)) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var req Req
		if _, empty := any(req).(none); !empty {
			if err := decode(w, r, &req); err != nil {
				answer(w, log, http.StatusBadRequest, errorBody{err.Error()})
				return
			}
		}
		res, err := do(r.Context(), mux.Vars(r)["id"], req)
		if err != nil {
			answer(w, log, status(err), errorBody{err.Error()})
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
